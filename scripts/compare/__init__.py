"""What each choice costs at each context length: train some real steps of every combination, and draw curves.

    python -m scripts.compare                                                # what this machine can show
    python -m scripts.compare attention=math,sdpa,flex,flash seq_len=1024,4096,16384,65536 model=gpt2-124m
    python -m scripts.compare attention=flash memory=none,selective,full seq_len=16k,64k,256k
    python -m scripts.compare precision=bf16,fp32 attention=sdpa --steps 40 --out runs/precision

Every setting of train.py may have several values. Each combination runs in a process of its own, with the same seed and
text. One that does not fit into memory, or is refused, is a result, too. The folder of --out then holds report.html,
report.md, report.json, report.svg, report.png, and runs.html with the learning curves. Started again, the command runs
what is missing.

Exit codes: 0; 1 if losses that must be equal differ, or a combination failed; 2 if the command cannot work.
"""
