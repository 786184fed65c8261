"""What `eval.py` does with a run or a config: speed, comparison with another run, language model tasks."""
