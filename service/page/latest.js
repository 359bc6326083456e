// Work that follows the hand: never two at a time, and what comes last is done.

/** One run at a time; asked while it runs, it runs once more after. `busy` is told when it begins and ends. */
export function latest(run, busy) {
  let running = null;
  let asked = false;
  const all = async () => {
    busy(true);
    while (asked) {
      asked = false;
      await run();
    }
    running = null;
    busy(false);
  };
  return () => {
    asked = true;
    return (running ??= all());
  };
}
