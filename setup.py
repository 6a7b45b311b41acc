"""What pyproject.toml cannot say: a wheel carries configs/ and launch/, so that `minitron init` has them to copy."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """The package, and in it the folders that lie beside it in a checkout; an editable install finds them there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "launch"):
                self.copy_tree(folder, str(Path(self.build_lib, "minitron_mcore", folder)))


setup(cmdclass={"build_py": BuildWithRecipes})
