"""Evaluate a trained model: held-out text, recall, tasks of lm-evaluation-harness.

python -m scripts.evaluate RUN                          its held-out text: loss and perplexity by tokens read before
python -m scripts.evaluate RUN --seq-len 65536          the same in rows of another length
python -m scripts.evaluate RUN --tasks recall,lambada_openai    tasks of lm-evaluation-harness
RUN is a run folder or a checkpoint; with --tasks also a folder of Hugging Face transformers. For a run on the recall
task a table has the share of right answers, by the length of the document and the place of the key in it.
"""
