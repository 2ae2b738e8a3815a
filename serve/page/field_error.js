/** The error of an input field, shown in place of its hint. */

/**
 * @param {HTMLInputElement} field
 * @returns {string} what is valid; "" if the value is
 */
export function errorOf({ validity, min, max }) {
  if (validity.valid) return "";
  if (validity.badInput) return "Must be a number.";
  if (validity.stepMismatch) return "Must be a whole number.";
  if (min && max) return `Must be between ${min} and ${max}.`;
  return min ? `Must be at least ${min}.` : `Must be at most ${max}.`;
}

/**
 * Shows or removes the field's error.
 * @param {HTMLInputElement} field
 * @returns {boolean} whether the value is valid
 */
export function showError(field) {
  const message = errorOf(field);
  const hint = field.closest(".field")?.querySelector("small");
  if (hint) {
    hint.dataset.hint ??= hint.textContent;
    hint.classList.toggle("error", message !== "");
    hint.setAttribute("role", message ? "alert" : "note");
    const text = message || hint.dataset.hint;
    if (hint.textContent !== text) hint.textContent = text;
  }
  if (message) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
  return message === "";
}

/**
 * @param {HTMLInputElement} field with an invalid value
 * @returns {string} a sentence, such as "Temperature must be between 0 and 2."
 */
export function sentenceOf(field) {
  const message = errorOf(field);
  return `${field.closest(".field").querySelector("span").textContent} ${message.charAt(0).toLowerCase()}${message.slice(1)}`;
}
