"""The one step that pyproject.toml cannot state: ``configs/``, ``eval/`` and ``scripts/`` go inside the package.

A wheel must not install top-level modules of those names; `llava_genhancer.resources` finds them in both places.
"""

import os
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("configs", "eval", "scripts")
LEFT_OUT = ("__pycache__", ".")


class BuildWithResources(build_py):
    """Copy the folders that exist into ``llava_genhancer/_resources``; an editable install reads them in place."""

    def _resources(self):
        """Pairs of a file's path in the checkout and in the build folder."""
        for name in RESOURCES:
            for folder, subfolders, files in os.walk(name):
                subfolders[:] = sorted(s for s in subfolders if not s.startswith(LEFT_OUT))
                for file in sorted(f for f in files if not f.startswith(LEFT_OUT) and not f.endswith(".pyc")):
                    source = os.path.join(folder, file)
                    yield source, os.path.join(self.build_lib, "llava_genhancer", "_resources", source)

    def run(self):
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(os.path.join(self.build_lib, "llava_genhancer", "_resources"), ignore_errors=True)
        for source, target in self._resources():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)  # keeps the mode: scripts stay executable

    def get_outputs(self, include_bytecode=1):
        """What was built, so that an uninstall removes it."""
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else outputs + [target for _, target in self._resources()]


setup(cmdclass={"build_py": BuildWithResources})
