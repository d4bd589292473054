// The review queue: j and k move, a, r and n decide; a reason is asked for where one is needed.
import { ask, base, complain } from "./tokens.js";

const KEYS = { a: "accepted", r: "rejected", n: "needs work" };

export function review() {
  const box = document.getElementById("review");
  if (!box) return;
  const why = document.getElementById("why");
  const problem = document.getElementById("review-problem");
  let wanted = null;

  const decide = (verdict) => complain(problem, async () => {
    const by = document.querySelector("input.who").value.trim() || localStorage.getItem("who") || "";
    if (!by) throw new Error("write your name above first: a decision is somebody's");
    if (verdict !== "accepted" && !why.value.trim()) {
      wanted = verdict;
      why.placeholder = `why ${verdict}? Enter sends it`;
      why.focus();
      return;
    }
    await ask(`${base()}/labels/${box.dataset.label}/review`, { verdict, by, why: why.value });
    // What was decided leaves the queue, so the next one takes its place.
    location.reload();
  });

  for (const button of box.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => decide(button.dataset.verdict));
  }
  document.getElementById("verdict").addEventListener("submit", (event) => {
    event.preventDefault();
    if (wanted) decide(wanted);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") document.activeElement.blur();
    if (event.target.matches("input, textarea, select")) return;
    if (event.key === "j") document.getElementById("later").click();
    if (event.key === "k") document.getElementById("earlier").click();
    if (KEYS[event.key]) {
      event.preventDefault();
      decide(KEYS[event.key]);
    }
  });
}
