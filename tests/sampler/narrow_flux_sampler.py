"""A sampler for a FLUX.1 that is narrow: the real program, where diffusers' converter has the real width as a constant.

Run as `python -m tests.sampler.narrow_flux_sampler` with a sampler's flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

REAL_WIDTH = 3072


def narrow(width: int) -> None:
    """Have the converter take such a width; nothing else of it is changed."""
    from diffusers.loaders import single_file_model

    convert = single_file_model.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(width if constant == REAL_WIDTH else constant for constant in convert.__code__.co_consts)
    assert constants != convert.__code__.co_consts
    convert.__code__ = convert.__code__.replace(co_consts=constants)


def main(argv: Sequence[str] | None = None) -> int:
    from services.sampler import __main__ as program
    from tests.tiny_models import flux

    narrow(flux().transformer.inner_dim)
    return program.main(argv)


if __name__ == "__main__":
    sys.exit(main())
