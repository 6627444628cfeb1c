// Arrows move from photo to photo in a grid. Elsewhere, and at its ends, they do what they always do.
if (!window.photoblipKeys) {
  window.photoblipKeys = true;
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const middle = (link) => {
    const box = link.closest('[class*="st-key-tile-"]').getBoundingClientRect();
    return [box.left + box.width / 2, box.top];
  };
  const move = (event) => {
    const step = steps[event.key];
    const grid = document.activeElement?.closest('[class*="st-key-grid-"]');
    if (!step || !grid || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const links = [...grid.querySelectorAll('[class*="st-key-links-"] > :first-child a')];
    const at = links.indexOf(document.activeElement);
    if (at < 0) return;
    const [x, y] = middle(links[at]);
    const next = step[0] ? links[at + step[0]] : links
      .map((link) => [link, ...middle(link)])
      .filter(([, left, top]) => Math.abs(left - x) < 5 && (top - y) * step[1] > 5)
      .sort((one, other) => (one[2] - other[2]) * step[1])[0]?.[0];
    if (!next) return;
    next.focus();
    event.preventDefault();
    event.stopPropagation(); // the photo page's own arrows turn to another photo
  };
  window.addEventListener("keydown", move, true);
}
