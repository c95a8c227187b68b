"""`python -m lymphfeat_cli`, and so `torchrun -m lymphfeat_cli`."""

from lymphfeat_cli.main import main

if __name__ == "__main__":
    main()
