"""Texts on an open page against their grounds, as WCAG 2 reckons them."""

CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    const unseen = !element.checkVisibility() || box.width < 2 || ["SCRIPT", "TITLE", "title", "desc"].includes(element.tagName);
    if (!own || unseen || element.disabled) continue;
    const style = getComputedStyle(element);
    let ground = element;
    while (ground && (channels(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
    const below = getComputedStyle(ground ?? document.body).backgroundColor;
    const colours = [element instanceof SVGElement ? style.fill : style.color, below];
    const [dark, light] = colours.map((c) => luminance(channels(c))).sort((a, b) => a - b);
    found.push([(light + 0.05) / (dark + 0.05), element.tagName, element.textContent.trim().slice(0, 40), colours.join(" on ")]);
  }
  return found;
}"""
"""JavaScript that gives [contrast, tag, beginning of the text, colours] of every text that can be seen."""
