"""`python -m common.demo`: see common/demo/__init__.py."""

from common import demo
from common.files.stage import run_stage

run_stage(demo.main)
