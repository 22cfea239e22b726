// Breadth-first search over all states; a state is known by 128 bits of hash.
#pragma once

#include <chrono>

#include "world.hpp"

struct Hash128 {
  uint64_t high, low;
  bool operator==(const Hash128& other) const { return high == other.high && low == other.low; }
};
struct HashOfHash {
  size_t operator()(const Hash128& hash) const { return hash.high; }
};

inline Hash128 hash_of(const State& state) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&state);
  uint64_t high = 1469598103934665603ULL, low = 0x9E3779B97F4A7C15ULL;
  for (size_t n = 0; n < sizeof state; n++) {
    high = (high ^ bytes[n]) * 1099511628211ULL;
    low = (low + bytes[n] + 1) * 0xD6E8FEB86659FD93ULL;
    low ^= low >> 32;
  }
  high ^= high >> 31;
  high *= 0xff51afd7ed558ccdULL;
  high ^= high >> 33;
  return {high, low};
}

struct Edge {
  int to;
  int8_t process;
};

class Search {
 public:
  explicit Search(const State& first, string name) : first_(first), name_(std::move(name)) { add(first, -1, {}); }

  void run() {
    auto began = std::chrono::steady_clock::now();
    auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); };
    while (!frontier_.empty()) {
      State state = frontier_.front();
      frontier_.pop_front();
      expand(state);
      if (expanded_ % 1'000'000 == 0)
        fprintf(stderr, "  %s: %dM expanded, %zu seen, %zu keyspaces, %.0f s\n", name_.c_str(), expanded_ / 1'000'000,
                seen_.size(), broker->keyspaces.size(), seconds());
      is_cut = static_cast<int>(seen_.size()) > scene.states;
      if (is_cut || (scene.stop && !monitors.found.empty())) break;
    }
    took_s = seconds();
  }

  // The actions that lead to a state, the first first.
  vector<Action> way_to(int state) const {
    vector<Action> actions;
    for (int at = state; at > 0; at = parents_[at].first) actions.push_back(parents_[at].second);
    std::reverse(actions.begin(), actions.end());
    return actions;
  }

  const State& first() const { return first_; }
  size_t states() const { return seen_.size(); }

  uint64_t transitions = 0, dead_ends = 0;
  int dead_end = -1;  // the first state without a step that is not the goal
  bool is_cut = false;
  double took_s = 0;
  // With `live` only:
  vector<State> kept;
  vector<vector<Edge>> edges;  // those that are no faults
  vector<char> goals;

 private:
  void expand(const State& state) {
    monitors.state_index = expanded_;
    int ways_out = 0;
    if (scene.live) edges.emplace_back();
    all_steps(state, [&](const Action& action, State& after, int process) {
      transitions++;
      if (memcmp(&after, &state, sizeof state)) ways_out++;
      int to = add(after, expanded_, action);
      if (scene.live && process >= 0) edges[expanded_].push_back({to, static_cast<int8_t>(process)});
    });
    if (scene.live) goals.push_back(is_goal(state));
    if (!ways_out && !is_goal(state)) {
      dead_ends++;
      if (dead_end < 0) dead_end = expanded_;
    }
    expanded_++;
  }

  int add(const State& state, int from, const Action& action) {
    auto [at, is_new] = seen_.emplace(hash_of(state), static_cast<int>(parents_.size()));
    if (is_new) {
      parents_.push_back({from, action});
      frontier_.push_back(state);
      if (scene.live) kept.push_back(state);
    }
    return at->second;
  }

  State first_;
  string name_;
  int expanded_ = 0;
  std::unordered_map<Hash128, int, HashOfHash> seen_;
  vector<std::pair<int, Action>> parents_;
  std::deque<State> frontier_;
};
