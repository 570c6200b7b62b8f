// Parameters in the server's order (that of the forward), cut into groups: one a layer, one a single weight outside.

// "layers.3.attn.q_proj.weight" → ["layers.3", "attn.q_proj.weight"]; "lm_head.weight" → ["", "lm_head.weight"].
export function split(name) {
  const parts = name.split(".");
  const last = parts.findLastIndex((part, k) => /^\d+$/.test(part) && k < parts.length - 1);
  if (last >= 0) return [parts.slice(0, last + 1).join("."), parts.slice(last + 1).join(".")];
  return parts.length > 2 ? [parts[0], parts.slice(1).join(".")] : ["", name];
}

export function grouped(tensors) {
  const groups = [];
  for (const tensor of tensors) {
    const [label, leaf] = split(tensor.name);
    const last = groups[groups.length - 1];
    if (last && last.label === label && label) last.rows.push({ tensor, leaf });
    else groups.push({ label, rows: [{ tensor, leaf }] });
  }
  return groups;
}

// Every word must occur; a word in slashes is a regular expression.
export function matcher(filter) {
  const words = (filter ?? "").trim().toLowerCase().split(/\s+/).filter(Boolean);
  const tests = words.map((word) => {
    const pattern = /^\/(.+)\/$/.exec(word);
    if (pattern) {
      try {
        const expression = new RegExp(pattern[1], "i");
        return (name) => expression.test(name);
      } catch {
        return (name) => name.includes(word);
      }
    }
    return (name) => name.includes(word);
  });
  return (name) => tests.every((test) => test(name.toLowerCase()));
}
