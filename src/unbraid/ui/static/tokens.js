// Tokens with their values as elements, the same as the server writes them; and requests to our own server.

export function alpha(value, max) {
  if (!(value > 0 && max > 0)) return 0;
  return Math.round(100 * (0.05 + 0.95 * Math.log10(1 + 9 * Math.min(value / max, 1))));
}

const LONGEST = 80;
const HIDDEN = /[\u0080-\u009f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/u;

// As the server's text.visible: control characters as pictures, hidden ones as the replacement sign.
export function visible(text) {
  return Array.from(text, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x20 && c !== "\n" && c !== "\t") return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return c.length === 1 && HIDDEN.test(c) ? "\ufffd" : c;
  }).join("");
}

export function span(token, value, max) {
  const element = document.createElement("span");
  element.className = "t";
  const level = value === null ? 0 : alpha(value, max);
  if (level) element.classList.add(`a${level}`);
  if (value === null) element.classList.add("unknown");
  else element.dataset.v = value.toFixed(3);
  const shown = token.length > LONGEST
    ? `${visible(token.slice(0, LONGEST))}… (${token.length.toLocaleString("en")} characters)`
    : visible(token);
  shown.split("\n").forEach((part, i) => {
    if (i) {
      const sign = document.createElement("i");
      sign.className = "nl";
      sign.textContent = "↵";
      element.append(sign, document.createElement("br"));
    }
    element.append(part);
  });
  return element;
}

export function tokens(record, max) {
  return record.tokens.map((token, i) => span(token, record.activations[i], max));
}

export function base() {
  return `/i/${document.body.dataset.index}`;
}

export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  if (!answer.ok) {
    const { error } = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    throw new Error(error);
  }
  return answer;
}

export async function complain(element, work) {
  element.hidden = true;
  try {
    return await work();
  } catch (error) {
    element.textContent = error.message;
    element.hidden = false;
    return undefined;
  }
}
