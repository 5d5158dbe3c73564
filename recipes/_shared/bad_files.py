"""The cause of a file that cannot be read, which ``datasets`` wraps in errors of its own."""

from _shared.errors import UserError, one_line


def cause_of(error: BaseException) -> str:
    """Return the message below ``datasets``' "An error occurred while generating the dataset"; a UserError is it."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    for cause in sorted(chain, key=lambda cause: not isinstance(cause, UserError)):
        if isinstance(cause, StopIteration):
            return "it has no rows"
        message = one_line(cause).removeprefix("An error occurred while generating the dataset").strip()
        if message:
            return "it has no rows" if message.endswith("corresponds to no data!") else message
    return type(chain[-1]).__name__
