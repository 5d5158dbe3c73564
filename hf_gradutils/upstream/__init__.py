"""Every private name of torch, accelerate, transformers and trl that the package uses, and nothing else.

Checked on torch 2.11, 2.13 and 2.15, accelerate 1.15, transformers 5.17 and 5.24, trl 1.16; a test fails when a name
moves. Each module needs the library of its name. The private methods that the Trainer overrides are listed in
:data:`hf_gradutils.upstream.transformers.TRAINER_METHODS` and checked by the same test.
"""
