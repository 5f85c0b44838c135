"""What the lmms-eval tasks of ``eval/`` do with a document: one module per benchmark, used by name in its YAML.

Each has ``images``, ``prompt`` and ``target`` (what is asked), ``options`` (what a model that scores answers by
likelihood chooses from; any of them is read back by :mod:`llava_genhancer.evaluate.mllm.answers`), ``process`` (one
reply to one item) and the metrics over items. Documents reach all but ``images`` without their images. Groups such as
MMVP's pairs are put together by the items' own keys, since ranks hand in their items one after the other; a group of
which a document was not asked (``--limit``) does not count. A metric of nothing is None, never 0.
"""
