// Which words two texts have in common: the longest common subsequence.

/**
 * @param {string[]} a
 * @param {string[]} b
 * @returns {[boolean[], boolean[]]} For each word of a, and of b, whether it is common. Takes
 *   a.length * b.length steps and as many numbers of 16 bits.
 */
export function common(a, b) {
  // lengths[i][j]: length of the longest common subsequence of a[i..] and b[j..].
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i][j] =
        a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  /** @type {boolean[]} */
  const inA = new Array(a.length).fill(false);
  /** @type {boolean[]} */
  const inB = new Array(b.length).fill(false);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      inA[i++] = true;
      inB[j++] = true;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

/**
 * Words and the spaces between them; joined they are the text.
 * @param {string} text
 * @returns {string[]}
 */
export const wordsOf = (text) => text.match(/\s+|\S+/g) || [];
