"""``python -m relu_deploy`` is the ``relu-deploy`` command."""

from relu_deploy.cli import main

if __name__ == "__main__":
    main(prog_name="relu-deploy")
