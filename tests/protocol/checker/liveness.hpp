// Liveness on the graph of all steps that are no faults: its strongly connected components (Tarjan).
#pragma once

#include "search.hpp"

class Components {
 public:
  explicit Components(const vector<vector<Edge>>& edges)
      : edges_(edges),
        index_(edges.size(), -1),
        low_(edges.size(), 0),
        on_stack_(edges.size(), 0),
        of(edges.size(), -1) {
    for (int root = 0; root < static_cast<int>(edges.size()); root++)
      if (index_[root] < 0) visit(root);
  }

 private:
  const vector<vector<Edge>>& edges_;
  vector<int> index_, low_;
  vector<char> on_stack_;
  vector<int> stack_;
  int counter_ = 0;

 public:
  vector<int> of;
  int count = 0;

 private:
  void visit(int root) {
    vector<std::pair<int, size_t>> path = {{root, 0}};
    while (!path.empty()) {
      auto& [at, next] = path.back();
      if (next == 0) {
        index_[at] = low_[at] = counter_++;
        stack_.push_back(at);
        on_stack_[at] = 1;
      }
      int deeper = -1;
      while (deeper < 0 && next < edges_[at].size()) {
        int to = edges_[at][next++].to;
        if (index_[to] < 0)
          deeper = to;
        else if (on_stack_[to])
          low_[at] = std::min(low_[at], index_[to]);
      }
      if (deeper >= 0) {
        path.push_back({deeper, 0});
        continue;
      }
      int done = at;
      if (low_[done] == index_[done]) close(done);
      path.pop_back();
      if (!path.empty()) low_[path.back().first] = std::min(low_[path.back().first], low_[done]);
    }
  }

  void close(int root) {
    for (int at = -1; at != root;) {
      at = stack_.back();
      stack_.pop_back();
      on_stack_[at] = 0;
      of[at] = count;
    }
    count++;
  }
};

struct Liveness {
  int components = 0, final_ones = 0, without_goal = 0, fair_cycles = 0;
  int stuck = -1;       // a state from which the goal is out of reach, without further faults
  int fair_cycle = -1;  // a state in a cycle that weak fairness allows
  vector<int> component_of;
};

inline Liveness look_for_liveness(const Search& search) {
  Components components(search.edges);
  int states = static_cast<int>(search.edges.size());
  vector<char> is_final(components.count, 1), has_goal(components.count, 0);
  vector<int> first(components.count, -1);
  // In a component: who moves within it, and who can move in every state of it.
  vector<uint32_t> moves(components.count, 0), always(components.count, 0xffffffff);
  for (int at = 0; at < states; at++) {
    int mine = components.of[at];
    uint32_t enabled = 0;
    if (first[mine] < 0) first[mine] = at;
    if (search.goals[at]) has_goal[mine] = 1;
    for (const auto& edge : search.edges[at]) {
      enabled |= 1U << edge.process;
      if (components.of[edge.to] == mine)
        moves[mine] |= 1U << edge.process;
      else
        is_final[mine] = 0;
    }
    always[mine] &= enabled;
  }
  Liveness found;
  found.components = components.count;
  auto earlier = [](int one, int other) { return one < 0 || other < one ? other : one; };
  for (int n = 0; n < components.count; n++) {
    found.final_ones += is_final[n];
    if (is_final[n] && !has_goal[n]) {
      found.without_goal++;
      found.stuck = earlier(found.stuck, first[n]);
    }
    if (!has_goal[n] && moves[n] && (always[n] & ~moves[n]) == 0) {
      found.fair_cycles++;
      found.fair_cycle = earlier(found.fair_cycle, first[n]);
    }
  }
  found.component_of = components.of;
  return found;
}
