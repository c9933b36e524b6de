"""Programs that run inside a sandbox: standard library only, read as text and never imported there.

Their text is put together by `asap_evaluator.harness`; importable so that tests can reach them.
"""
