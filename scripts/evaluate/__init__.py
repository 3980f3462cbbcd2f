"""What a trained model can do, after training.

python -m scripts.evaluate RUN                          its held-out text: loss and perplexity by tokens read before
python -m scripts.evaluate RUN --seq-len 65536          the same in rows of another length
python -m scripts.evaluate RUN --tasks recall,lambada_openai    tasks of lm-evaluation-harness
RUN is a run folder or a checkpoint; with --tasks also a folder of Hugging Face transformers. Of a run on the recall
task a table says which answers were right, by the length of the document and by where in it the key was told.
"""
