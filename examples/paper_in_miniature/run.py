"""The experiments: `python examples/paper_in_miniature/run.py`. See README.md."""

if __name__ == "__main__":
    # Here, because processes that check answers import this file, and need none of it
    from experiments import main

    main()
