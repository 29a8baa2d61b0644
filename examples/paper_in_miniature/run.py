"""Run the experiments: `python examples/paper_in_miniature/run.py`. See README.md."""

if __name__ == "__main__":
    # Worker processes of the answer checker import this file and must not import the experiments
    from experiments import main

    main()
