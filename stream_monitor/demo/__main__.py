"""`python -m stream_monitor.demo`."""

from stream_monitor.demo.run import main

if __name__ == "__main__":
    main()
