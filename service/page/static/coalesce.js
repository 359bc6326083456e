// Runs an asynchronous task on frequent events, such as the moves of a slider.

/**
 * Returns a function that runs the task, at most one run at a time. Calls during a run are merged into one more run after it,
 * so that the last call always takes effect.
 *
 * @param {() => Promise<void>} task
 * @param {(busy: boolean) => void} onBusyChange runs before the first and after the last run of a series
 * @returns {() => Promise<void>} resolves when no run is left
 */
export function coalesce(task, onBusyChange) {
  let running = null;
  let requested = false;
  const runAll = async () => {
    onBusyChange(true);
    while (requested) {
      requested = false;
      await task();
    }
    running = null;
    onBusyChange(false);
  };
  return () => {
    requested = true;
    return (running ??= runAll());
  };
}
