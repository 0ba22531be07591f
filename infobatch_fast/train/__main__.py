"""`python -m infobatch_fast.train`."""

import signal

if __name__ == "__main__":
    # Ctrl-C during two seconds of imports: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from infobatch_fast.train.loop import main

if __name__ == "__main__":
    sys.exit(main())
