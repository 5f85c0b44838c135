"""A tiny LLaVA, both as transformers' form and as the original's, whose answers vary from question to question."""

from pathlib import Path

import torch


def write_llava_folders(
    folder: Path, *, llm: str = "toyworld:llama", tower: str = "toyworld:clip", conversation: str = "v1"
) -> Path:
    """``hf/`` and ``llava/`` in ``folder``, the same weights in both, as a finetuning leaves them."""
    from llava_genhancer.llava.checkpoint import Checkpoint, raw_config
    from llava_genhancer.llava.hf import write_hf
    from llava_genhancer.llava.model import build_projector, llava_config, load_llm
    from llava_genhancer.llava.original import write_llava
    from llava_genhancer.llava.recipes import LlavaRecipe

    recipe = LlavaRecipe(llm=llm, tower=tower)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = {n: 4 * w for n, w in build_projector(llava_config(recipe)).state_dict().items()}
        language = load_llm(recipe.llm, torch.float32).state_dict()
        # The shipped weights alone say "B" to every question that they were not trained on.
        language |= {n: w + 2 * w.std() * torch.randn_like(w) for n, w in language.items() if w.ndim > 1}
    checkpoint = Checkpoint(
        llm_config=raw_config(recipe.llm),
        companions=recipe.llm,
        tower=recipe.tower,
        language=language,
        projector=projector,
        conversation=conversation,
        image_mode="pad",
        vision_feature_layer=-2,
        dtype=torch.float32,
    )
    for name, write in (("hf", write_hf), ("llava", write_llava)):
        (folder / name).mkdir(parents=True)
        write(checkpoint, folder / name)
    return folder
