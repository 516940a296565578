"""``python -m horse_plugin`` is the command ``horse``."""

from horse_plugin.cli.main import run

if __name__ == "__main__":
    run()
