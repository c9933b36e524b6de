"""Leave with 0 when one of the URLs answers with 200: for images without curl.

python health.py http://127.0.0.1:8000/healthz http://127.0.0.1:9100/healthz
"""

import sys
import urllib.request


def answers(url: str) -> bool:
    """Whether the URL answers with 200 within 4 seconds."""
    try:
        with urllib.request.urlopen(url, timeout=4) as reply:
            return reply.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not any(answers(url) for url in sys.argv[1:]))
