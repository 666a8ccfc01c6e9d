"""Start simulators, and call several at the same time."""

from multiprocessing.pool import ThreadPool


def side_by_side(call, envs, arguments, env_fault):
    """[call(env, argument, env_fault)]: at once for different workers, in this order for one."""
    queues = {}
    for index, env in enumerate(envs[: len(arguments)]):
        queues.setdefault(env.worker, []).append(index)
    results = {}

    def work(queue):
        for index in queue:
            results[index] = call(envs[index], arguments[index], env_fault)

    if len(queues) > 1:
        with ThreadPool(len(queues)) as pool:  # its threads do not hold up the end of the program
            pool.map(work, queues.values())
    else:
        for queue in queues.values():
            work(queue)
    return [results[index] for index in range(len(arguments))]


def reset_env(env, job, env_fault):
    """Reset the environment; a few tries, as a simulator may have to be built anew."""
    for attempt in range(1, 6):
        try:
            return env.reset(job.task, job.variation)
        except env_fault as fault:
            if attempt == 5:
                raise RuntimeError(
                    f"the simulator failed to start five times in a row: {fault}"
                ) from fault
