"""`python -m stream_monitor` is the command `stream-monitor`."""

from stream_monitor.cli import main

if __name__ == "__main__":
    main()
