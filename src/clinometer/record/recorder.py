"""The older name of `clinometer.record.Recorder`."""

from clinometer.record.write.recorder import Recorder as Recorder
