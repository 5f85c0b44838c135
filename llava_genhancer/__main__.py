"""``python -m llava_genhancer``, for torchrun and the deepspeed launcher."""

from llava_genhancer.cli import main

if __name__ == "__main__":
    main()
