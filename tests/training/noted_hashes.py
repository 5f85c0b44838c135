"""The command line of one rank, with what it hashes appended to a file: python noted_hashes.py NOTES VERB ..."""

import json
import sys

from llava_genhancer import cli, files

hash_files = files.hash_files


def noted(folder, names, **options):
    with open(sys.argv[1], "a") as notes:
        notes.write(json.dumps([folder.name, sorted(names)]) + "\n")
    return hash_files(folder, names, **options)


if __name__ == "__main__":
    files.hash_files = noted
    cli.main(sys.argv[2:])
