"""``scripts/enhance_then_llava.sh``'s command line."""

from llava_genhancer.chain.command import main

if __name__ == "__main__":
    main()
