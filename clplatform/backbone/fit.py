"""Does a backbone fit a stream? Checked before anything is loaded."""

from __future__ import annotations

from clplatform.types import ClplatformError, InputSpec, Modality

FITTING = {"text": "bert_tiny, minilm, distilbert or bert_base", "image": "vit_tiny, vit_b16, deit_small or mlp"}


def require_modality(name: str, input: InputSpec, modality: Modality) -> None:
    """Refuse a stream that the backbone cannot read.

    Raises:
        ClplatformError: images for a text model or the other way round.
    """
    if input.modality != modality:
        raise ClplatformError(
            f"backbone={name} reads {modality}s, but the stream is made of {input.modality}s; "
            f"choose backbone={FITTING[input.modality]}"
        )


def fit_patches(size: int) -> tuple[int, int]:
    """Patch size and image size for images of this height and width, in pixels.

    At most 8 × 8 patches of 2 × 2 pixels or more; where no such patch size divides the image, the image is
    enlarged to the next multiple. 8 → (2, 8), 28 → (4, 28), 32 → (4, 32), 64 → (8, 64), 31 → (4, 32).
    """
    smallest = max(2, -(-size // 8))
    patch = next((p for p in range(smallest, 2 * smallest + 1) if size % p == 0), smallest)
    return patch, -(-size // patch) * patch
