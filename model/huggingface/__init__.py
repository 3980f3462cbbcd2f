"""Models as Hugging Face transformers keeps them, both ways: `settings` is its config.json and `weights` its tensors,
which lie in `shards`; `folder` is what lies beside them.

transformers itself is not imported, here or anywhere: it would take this repository's `kernels` folder for the Hugging
Face package of that name.
"""
