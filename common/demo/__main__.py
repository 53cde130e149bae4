from common import demo
from common.files.stage import run_stage

run_stage(demo.main)
