"""`python -m vlmq_vllm.offline` is `vlmq`."""

from vlmq_vllm.offline.commands.app import main

main()
