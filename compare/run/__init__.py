"""``compare run``: from specs of models and data to result files, each model in a process of its own.

The rooms, in the order data flows::

    request ──► specs/ ──► plan/ ──► processes/ ──► store ──► (compare.results reads it)

======================================  ==========================================================================
``main.py``                             the command: calls the rooms below in order, then draws the plot
``request.py``                          what the user asked for, typed; built by ``compare/commands/run.py``
``specs/loading.py``                    spec files to entries; messages about mistakes in them
``specs/schema.py``                     which fields a spec may have
``specs/engines.py``                    which harness model a ``load_fn`` means; an engine's version
``specs/paths.py``                      which values are paths, and where they lead
``plan/selection.py``                   request to jobs: specs, -mask, divergence
``plan/job_settings.py``                entry and shared settings to one job
``plan/job.py``                         one run of the harness: its command line and its key
``plan/fingerprint.py``                 the identity of checkpoints, tokenizers and texts, for keys
``plan/window_tasks.py``                which tasks score token windows
``plan/reference.py``                   which job writes the reference, which jobs are measured against it
``plan/reference_folder.py``            whether a reference is stored, complete, and by which model
``plan/task.py``                        jobs to tasks by key; which tasks have a result already
``processes/local_pool.py``             tasks on this machine, with GPUs assigned
``processes/ray_pool.py``               tasks on a Ray cluster
``processes/queue.py``                  which task may start next
``processes/harness_process.py``        one harness process: started, followed, ended
``processes/fork_servers.py``           starts harness processes by forking them from servers
``processes/fork_server.py``            such a server: imports the harness and one engine, then forks
``processes/supervisor.py``             ends the harness when its parent is gone, kill -9 included
``processes/progress.py``               progress bars in a log
``processes/outcome.py``                how a task ended; publishes its result
``processes/failure_hints.py``          the reason of a failure, and what to do
``store.py``                            the results folder: results by key, labels, logs
``traces.py``                           `compare traces`: the original's answers, made in a process of its own
``display.py``                          what the terminal shows
======================================  ==========================================================================
"""
