// SHA-1 (FIPS 180-4), which scripts have as `redis.sha1hex`.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

inline std::string sha1_hex(std::string text) {
  auto rotate = [](uint32_t word, int bits) { return word << bits | word >> (32 - bits); };
  uint64_t bits = text.size() * 8;
  text += static_cast<char>(0x80);
  while (text.size() % 64 != 56) text += '\0';
  for (int byte = 7; byte >= 0; byte--) text += static_cast<char>(bits >> (8 * byte));
  uint32_t state[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
  for (size_t block = 0; block < text.size(); block += 64) {
    uint32_t words[80];
    for (int n = 0; n < 16; n++) {
      words[n] = 0;
      for (int byte = 0; byte < 4; byte++)
        words[n] = words[n] << 8 | static_cast<unsigned char>(text[block + 4 * n + byte]);
    }
    for (int n = 16; n < 80; n++) words[n] = rotate(words[n - 3] ^ words[n - 8] ^ words[n - 14] ^ words[n - 16], 1);
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
    for (int n = 0; n < 80; n++) {
      uint32_t mixed = n < 20   ? ((b & c) | (~b & d)) + 0x5A827999
                       : n < 40 ? (b ^ c ^ d) + 0x6ED9EBA1
                       : n < 60 ? ((b & c) | (b & d) | (c & d)) + 0x8F1BBCDC
                                : (b ^ c ^ d) + 0xCA62C1D6;
      uint32_t next = rotate(a, 5) + mixed + e + words[n];
      e = d, d = c, c = rotate(b, 30), b = a, a = next;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e;
  }
  std::string hex;
  for (uint32_t word : state) {
    char buffer[9];
    snprintf(buffer, sizeof buffer, "%08x", word);
    hex += buffer;
  }
  return hex;
}
