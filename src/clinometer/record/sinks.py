"""The older name of `clinometer.record.TensorBoard` and `clinometer.record.Tracker`."""

from clinometer.record.out.trackers import TensorBoard as TensorBoard
from clinometer.record.out.trackers import Tracker as Tracker
