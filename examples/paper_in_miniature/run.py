"""Run the experiments: `python examples/paper_in_miniature/run.py`. See README.md."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # parts that are shared with other experiments
    # Worker processes of the answer checker import this file and must not import the experiments
    from experiments import main

    main()
