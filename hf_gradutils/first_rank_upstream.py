"""The place where ``route_first_rank`` was documented; import it from :mod:`hf_gradutils`."""

from hf_gradutils.coordination.route import route_first_rank

__all__ = ["route_first_rank"]
