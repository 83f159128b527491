"""How runs stand, from their files alone: step, time left, goodput, last evaluation, restarts and why, slowest worker.

python launch/status.py runs/first runs/second
python launch/status.py --watch runs/first          # drawn again every two seconds, until all have ended for good
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

from trainers.record import standing
from trainers.world import process

if __name__ == "__main__":
    process.main(standing.settings_from, standing.main)
