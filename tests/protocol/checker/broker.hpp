// The broker: keyspaces by number, calls by number, and what a call makes of a keyspace, found out once with the real
// scripts.
#pragma once

#include <deque>
#include <sstream>
#include <unordered_map>

#include "lua.hpp"
#include "scene.hpp"

// ---- what the model asks of a keyspace

enum Meta : uint8_t { NO_META, IS_STARTED, IS_RETRY, IS_SUCCESS, IS_FAILURE, IS_REVOKED, IS_EXPIRED };
inline const char* const META_NAMES[] = {"-", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED", "EXPIRED"};

inline bool is_end(int meta) { return meta >= IS_SUCCESS; }

inline Meta meta_of(const string& stored) {
  size_t begin = stored.find("\"status\":\"") + 10;
  string status = stored.substr(begin, stored.find('"', begin) - begin);
  if (status == "STARTED") return IS_STARTED;
  if (status == "RETRY") return IS_RETRY;
  if (status == "SUCCESS") return IS_SUCCESS;
  if (status == "FAILURE") return IS_FAILURE;
  if (status == "REVOKED") return stored.find("expired") != string::npos ? IS_EXPIRED : IS_REVOKED;
  return NO_META;
}

struct Claim {
  uint8_t worker, incarnation, number, task, started, from_intake, is_first, sending;

  bool same_as(const Claim& other) const {
    return worker == other.worker && incarnation == other.incarnation && number == other.number;
  }
};

enum Scheduled : uint8_t { NOT_SCHEDULED, WAITS_FOR_ITS_TIME, IS_DUE, ONLY_ITS_MESSAGE };

enum Answer : uint8_t { NO_ANSWER, IS_UNKNOWN, HAD_ENDED, WAS_CANCELLED };  // to a wish to cancel

inline int sending_of(const string& message) {  // 0: the first; copies have the number of what they are copies of
  size_t at = message.rfind('#');
  return at == string::npos ? 0 : atoi(message.c_str() + at + 1);
}

struct View {
  uint8_t queued[TASKS] = {}, in_intake[TASKS] = {}, scheduled[TASKS] = {}, meta[TASKS] = {}, marked[TASKS] = {};
  uint8_t letter[TASKS] = {}, letter_run[TASKS] = {}, letter_attempts[TASKS] = {};
  uint8_t letter_sending[TASKS] = {}, scheduled_sending[TASKS] = {};
  Answer answer[TASKS] = {};
  char remembered[TASKS] = {};     // how it has ended, as a letter; 0: not known
  uint8_t running[TASKS] = {};     // cancelled while it ran
  uint8_t sent_again[TASKS] = {};  // bits of its messages that wait in queues, by number of the sending
  uint8_t attempts[TASKS] = {}, crashes[TASKS] = {}, losses[TASKS] = {}, shared[TASKS] = {}, is_tried[TASKS] = {};
  uint8_t stray_start = 0, lately = 0, alone = 0, alone_incarnation = 0;  // alone: 1 + the worker
  uint8_t lease[WORKERS] = {}, member[WORKERS] = {};                      // a bit for each incarnation
  uint8_t cancel_requests = 0, letter_requests = 0, events = 0, parts = 0, follow_requests = 0, webhooks = 0;
  uint8_t logged[TASKS] = {};  // entries of its log
  string log_fault;            // what is wrong with a log
  vector<Claim> claims;

  bool has_lease(int worker, int incarnation) const { return lease[worker] >> incarnation & 1; }
  bool is_member(int worker, int incarnation) const { return member[worker] >> incarnation & 1; }
};

inline int places(const View& view, int task) {  // in how many places a task's messages are
  int count = view.queued[task] + view.in_intake[task] + (view.scheduled[task] ? 1 : 0);
  for (const auto& claim : view.claims) count += claim.task == task;
  return count;
}

class Reader {  // of a keyspace
 public:
  explicit Reader(const Keyspace& keys) : keys_(keys) {}

  const Value* at(const string& key) const {
    auto found = keys_.find(key);
    return found == keys_.end() ? nullptr : &found->second;
  }
  bool has(const string& key) const { return at(key) != nullptr; }
  bool in_set(const string& key, const string& member) const { return has(key) && at(key)->set.count(member); }
  bool in_sorted(const string& key, const string& member) const { return has(key) && at(key)->sorted.count(member); }
  bool in_hash(const string& key, const string& field) const { return has(key) && at(key)->hash.count(field); }
  int number(const string& key, const string& field) const {
    return in_hash(key, field) ? atoi(at(key)->hash.at(field).c_str()) : 0;
  }
  uint8_t length(const string& key) const {
    const Value* value = at(key);
    return value ? static_cast<uint8_t>(value->list.size() + value->stream.size()) : 0;
  }
  void count(const string& key, uint8_t* by_task, uint8_t* sendings) const {
    if (const Value* value = at(key))
      for (const auto& message : value->list)
        if (int task = task_of(message); task >= 0) {
          by_task[task]++;
          sendings[task] |= 1 << sending_of(message);
        }
  }

 private:
  const Keyspace& keys_;
};

inline void look_at_task(const Reader& read, int task, View& view) {
  string id = TASK_NAMES[task], hash = "task:" + id, letter = "dead:" + id;
  if (const Value* meta = read.at("celery-task-meta-" + id)) view.meta[task] = meta_of(meta->text);
  if (read.in_sorted("scheduled", id))
    view.scheduled[task] = read.at("scheduled")->sorted.at(id) <= 1000 ? IS_DUE : WAITS_FOR_ITS_TIME;
  else if (read.in_hash("scheduled:messages", id))
    view.scheduled[task] = ONLY_ITS_MESSAGE;
  if (read.in_hash("scheduled:messages", id))
    view.scheduled_sending[task] = sending_of(read.at("scheduled:messages")->hash.at(id));
  view.marked[task] = read.in_sorted("cancelled", id);
  view.letter[task] = read.has(letter);
  view.letter_run[task] = read.number(letter, "run");
  view.letter_attempts[task] = read.number(letter, "attempts");
  if (read.in_hash(letter, "message")) view.letter_sending[task] = sending_of(read.at(letter)->hash.at("message"));
  view.attempts[task] = read.number(hash, "attempts");
  view.crashes[task] = read.number(hash, "crashes");
  view.losses[task] = read.number(hash, "losses");
  view.shared[task] = read.number(hash, "shared");
  view.is_tried[task] = read.in_set("tried", id);
  view.running[task] = read.in_set("cancelled:running", id);
  if (const Value* answer = read.at("cancelled:answer:" + id))
    view.answer[task] = answer->text == "unknown"     ? IS_UNKNOWN
                        : answer->text == "cancelled" ? WAS_CANCELLED
                                                      : HAD_ENDED;
  for (const char* hash : {"ended:before", "ended"})
    if (read.in_hash(hash, id)) view.remembered[task] = read.at(hash)->hash.at(id)[0];
}

inline string field_in(const vector<string>& entry, const string& name) {  // of a log; it begins with its id
  for (size_t n = 1; n + 1 < entry.size(); n += 2)
    if (entry[n] == name) return entry[n + 1];
  return "";
}

// What is wrong with a task's log: each entry follows on the one before it, an attempt begins with its start, and the
// end of a run is its last entry and knows how many outputs the attempt has given out.
inline string fault_of_log(const vector<vector<string>>& log) {
  string before = "0-0";
  long long ended_run = 0, outputs = 0, major = 0;
  for (const auto& entry : log) {
    auto [at, seq] = place_of(entry[0]);
    string event = field_in(entry, "e");
    bool is_end = event == "succeeded" || event == "failed" || event == "cancelled" || event == "expired";
    if (field_in(entry, "p") != before) return "an entry does not follow on the one before it";
    if (at >> 20 == ended_run) return "an event comes after the end of its run";
    if (at != major && at % (1 << 20) && event != "started") return "an attempt begins without its start";
    if (event == "output" && at % (1 << 20) == 0) return "an output stands before the first attempt";
    if (at != major) outputs = 0;
    if (event == "output" && atoll(field_in(entry, "o").c_str()) != ++outputs) return "an output is counted wrongly";
    if (is_end && atoll(field_in(entry, "o").c_str()) != outputs) return "an end counts other outputs than there are";
    if (is_end) ended_run = at >> 20;
    major = at, before = entry[0];
  }
  return "";
}

inline void look_at_log(const Reader& read, int task, View& view) {
  string id = TASK_NAMES[task];
  const Value* log = read.at("log:" + id);
  if (!log) return;
  view.logged[task] = static_cast<uint8_t>(log->stream.size());
  string fault = fault_of_log(log->stream);
  bool is_open = read.in_hash("logs", id);
  string last = field_in(log->stream.back(), "e");
  static const char* const LAST[] = {"", "", "", "succeeded", "failed", "cancelled", "expired"};
  if (is_end(view.meta[task]) && is_open) fault = "the log of an ended task is open";
  if (is_end(view.meta[task]) && last != LAST[view.meta[task]]) fault = "the last entry is not how the task has ended";
  if (!fault.empty()) view.log_fault = fault + " (" + id + ")";
}

inline void look_at_worker(const Reader& read, int worker, int incarnation, View& view) {
  string id = worker_id(worker, incarnation), key = "worker:" + id;
  if (read.has(key)) view.lease[worker] |= 1 << incarnation;
  if (read.in_set("workers", id)) view.member[worker] |= 1 << incarnation;
  const Value* inflight = read.at(key + ":inflight");
  if (const Value* started = read.at(key + ":started"))
    for (const auto& [field, task] : started->hash)
      if (!read.in_hash(key + ":inflight", field)) view.stray_start = 1;
  if (!inflight) return;
  for (const auto& [field, message] : inflight->hash) {
    Claim claim;
    claim.worker = worker;
    claim.incarnation = incarnation;
    claim.number = atoi(field.c_str());
    claim.task = task_of(message);
    claim.started = read.in_hash(key + ":started", field);
    claim.from_intake = field.find("inference.m") == string::npos;
    claim.is_first = field.find("!:") != string::npos;
    claim.sending = sending_of(message);
    view.claims.push_back(claim);
  }
}

inline View look(const Keyspace& keys) {
  View view;
  Reader read(keys);
  read.count("inference.m", view.queued, view.sent_again);
  read.count("inference", view.in_intake, view.sent_again);
  view.parts = read.length("inference.parts");
  view.webhooks = read.length("samphire.webhooks.h");
  for (int task = 0; task < TASKS; task++) look_at_task(read, task, view);
  for (int task = 0; task < TASKS; task++) look_at_log(read, task, view);
  view.lately = read.has("cancelled:lately");
  if (const Value* alone = read.at("alone")) {
    view.alone = 1 + alone->text[0] - 'A';
    view.alone_incarnation = alone->text[1] - '0';
  }
  for (int worker = 0; worker < WORKERS; worker++)
    for (int incarnation = 0; incarnation < 4; incarnation++) look_at_worker(read, worker, incarnation, view);
  view.cancel_requests = read.length("sub:cancels");
  view.letter_requests = read.length("sub:letters");
  view.events = read.length("events:c");
  view.follow_requests = read.length("sub:follows");
  return view;
}

// ---- keyspaces and calls by number

class Keyspaces {
 public:
  int number_of(const Keyspace& keys) {
    auto [at, is_new] = numbers_.emplace(freeze(keys), static_cast<int>(frozen_.size()));
    if (is_new) {
      frozen_.push_back(&at->first);
      views_.push_back(look(keys));
    }
    return at->second;
  }
  Keyspace keys(int number) const { return Thaw(*frozen_[number]).keys(); }
  const View& view(int number) const { return views_[number]; }
  bool has_queue(int number, const string& queue) const {  // whether it is named
    Keyspace keyspace = keys(number);
    return Reader(keyspace).in_set("sub:queues", queue);
  }
  size_t size() const { return frozen_.size(); }

 private:
  std::unordered_map<string, int> numbers_;
  vector<const string*> frozen_;
  std::deque<View> views_;
};

struct Call {
  string verb;  // the script, or "edit": plain commands, one an argument, its words between tabs
  vector<string> keys, args;
};

struct Done {
  int broker;
  Reply reply;
  vector<Effect> effects;
};

// The files of a script: those that stand before it are named in a line "-- With: ended, attempts".
inline vector<string> with_what_stands_before(const string& folder, const string& verb) {
  vector<string> paths = {folder + "shared/common.lua"};
  std::ifstream file(folder + verb + ".lua");
  for (string line; std::getline(file, line);) {
    if (line.compare(0, 9, "-- With: ") != 0) continue;
    std::stringstream names(line.substr(9));
    for (string name; names >> name;) paths.push_back(folder + "shared/" + name.substr(0, name.find(',')) + ".lua");
  }
  paths.push_back(folder + verb + ".lua");
  return paths;
}

class Broker {
 public:
  Broker(const string& root, int dump, const string& dump_path) : scripts_(commands_), dump_(dump) {
    const string folder = root + "/broker/samphire_broker/store/lua/";
    for (const char* verb : {"alone", "append", "beat", "cancel", "claim", "due", "follow", "leave", "letters", "reap", "release", "route",
                             "schedule", "settle", "start"})
      scripts_.load(verb, with_what_stands_before(folder, verb));
    scripts_.load("submit", {root + "/clients/python/samphire/transport/submit.lua"});
    if (dump_) dump_file_ = fopen(dump_path.c_str(), "w");
  }
  ~Broker() {
    if (dump_file_) fclose(dump_file_);
  }

  int number_of(const Call& call) {
    string name;
    put_text(name, call.verb);
    for (const auto& key : call.keys) put_text(name, key);
    name += '|';
    for (const auto& arg : call.args) put_text(name, arg);
    auto [at, is_new] = call_numbers_.emplace(name, static_cast<int>(calls_.size()));
    if (is_new) calls_.push_back(call);
    return at->second;
  }

  const Done& run(int keyspace, int call) {
    uint64_t both = static_cast<uint64_t>(keyspace) << 24 | static_cast<uint64_t>(call);
    auto found = done_.find(both);
    if (found != done_.end()) return found->second;
    return done_.emplace(both, run_anew(keyspace, calls_[call])).first->second;
  }

  const Call& call(int number) const { return calls_[number]; }
  size_t calls() const { return calls_.size(); }
  uint64_t runs() const { return runs_; }

  Keyspaces keyspaces;

 private:
  Done run_anew(int keyspace, const Call& call) {
    runs_++;
    commands_.keys = keyspaces.keys(keyspace);
    commands_.effects.clear();
    bool is_script = call.verb != "edit";
    bool dumps = dump_file_ && is_script && (runs_ * 2654435761U >> 7) % dump_ == 0;
    string before = dumps ? json_keys(commands_.keys) : "";
    Done done;
    done.reply = is_script ? scripts_.run(call.verb, call.keys, call.args) : edit(call.args);
    if (done.reply.type == 'e' && done.reply.text.find("NOLEASE") == string::npos) {
      fprintf(stderr, "script %s failed: %s\n", call.verb.c_str(), done.reply.text.c_str());
      exit(6);
    }
    done.effects = commands_.effects;
    done.broker = keyspaces.number_of(commands_.keys);
    if (dumps) dump(call, before, done.reply);
    return done;
  }

  Reply edit(const vector<string>& lines) {
    Reply reply;
    for (const auto& line : lines) {
      Words words;
      std::stringstream parts(line);
      for (string word; std::getline(parts, word, '\t');) words.push_back(word);
      reply = commands_.run(words);
    }
    return reply;
  }

  void dump(const Call& call, const string& before, const Reply& reply) {
    auto hex = [](const string& text) {
      string out;
      char buffer[4];
      for (unsigned char c : text) {
        snprintf(buffer, sizeof buffer, "%02x", c);
        out += buffer;
      }
      return json_text(out);
    };
    fprintf(dump_file_, "{\"verb\":%s,\"before\":%s,\"after\":%s,\"reply\":%s,\"keys\":%s,\"args\":%s}\n",
            json_text(call.verb).c_str(), before.c_str(), json_keys(commands_.keys).c_str(), json_reply(reply).c_str(),
            json_items(call.keys, '[', ']', json_text).c_str(), json_items(call.args, '[', ']', hex).c_str());
  }

  Commands commands_;
  Scripts scripts_;
  int dump_;
  FILE* dump_file_ = nullptr;
  uint64_t runs_ = 0;
  std::unordered_map<string, int> call_numbers_;
  std::deque<Call> calls_;
  std::unordered_map<uint64_t, Done> done_;
};

inline Broker* broker = nullptr;  // one a run

inline const View& view_of(const State& state) { return broker->keyspaces.view(state.broker); }
