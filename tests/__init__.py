"""The tests. Modules that tests share are imported from here: ``from tests.pipeline.line import SleepingStage``."""
