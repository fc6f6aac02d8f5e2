"""`python -m vlmq_vllm.offline` is `vlmq`."""

from vlmq_vllm.offline.cli import main

main()
