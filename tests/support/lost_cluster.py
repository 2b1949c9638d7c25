"""A trainer whose cluster of Ray is shut down under it."""

import torch

from tests.end_to_end.test_faults import Trainer
from tests.support.cluster import local_cluster


def main() -> None:
    torch.set_num_threads(1)
    with local_cluster():
        from skfac.service.ray import start_pool

        pool = start_pool(num_cpus=0)
        trainer = Trainer(pool.target, update_every=1, wait_s=1.0)
        trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
    for _ in range(5):
        trainer.step()  # with versions that came out of the object store
    trainer.step_until(lambda report: not report["connected"])
    trainer.preconditioner.close()
    print("done")


if __name__ == "__main__":
    main()
