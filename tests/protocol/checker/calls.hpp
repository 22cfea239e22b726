// Calls as `Store` and `Publisher` build them (`calls.py` compares them).
#pragma once

#include "broker.hpp"

inline const string LISTS[2] = {"inference.m", "inference"};
inline const string META = "celery-task-meta-", CLIENT_STREAM = "events:c", PART_LIST = "inference.parts";
inline const string WEBHOOK_LIST = "samphire.webhooks.h";

// A message begins with the names of its task and of the steps that follow; what is sent again is another message.
inline string message_of(int task, int sending = 0) {
  bool is_canvas = task == 3 && scene.canvas;  // it has the id of the last step
  string steps = is_canvas ? "td>ta,tb" : task == 0 && scene.chain ? "ta,tb" : TASK_NAMES[task];
  string id = is_canvas ? TASK_NAMES[1] : TASK_NAMES[task];
  return steps + " \"correlation_id\":\"" + id + "\"" + (sending ? "#" + std::to_string(sending) : "");
}

inline string worker_key(int worker, int incarnation) { return "worker:" + worker_id(worker, incarnation); }

inline string field_of(const Held& held) {
  return std::to_string(held.number) + (held.is_first ? "!:" : ":") + LISTS[held.from_intake];
}

inline string meta_text(const string& status, int task, const string& what = "x") {
  return "{\"status\":\"" + status + "\",\"task_id\":\"" + TASK_NAMES[task] + "\",\"result\":\"" + what + "\"}";
}

inline Call call_edit(const vector<string>& commands) { return {"edit", {}, commands}; }

inline Call call_drop_lease(int worker, int incarnation) {
  string key = worker_key(worker, incarnation);
  return call_edit({"DEL\t" + key + "\t" + key + ":info"});
}

inline Call call_submit(int task, const string& once, bool with_key) {
  const string& list = LISTS[scene.intake ? 1 : 0];
  const string separator = "\x06\x16";
  Call call{"submit",
            {list, list, list + separator + "3", list + separator + "6", list + separator + "9", "sub:queues",
             "sub:once:" + once},
            {list, "0", "0", "0:wake", "86400", "300"}};
  if (with_key) {
    call.keys.push_back("sub:key:k");
    call.args.insert(call.args.end(), {"3600", TASK_NAMES[task], "digest"});
  } else {
    call.args.insert(call.args.end(), {"", "", ""});
  }
  call.args.insert(call.args.end(), {"1", "schema", "0"});  // and no claim checks
  call.args.push_back(message_of(task));
  return call;
}

inline Call call_beat(int worker, int incarnation) {
  string key = worker_key(worker, incarnation);
  return {"beat", {key, key + ":info", "workers", "samphire.namespace"}, {worker_id(worker, incarnation), "12000", "{}"}};
}

inline Call call_claim(int worker, int incarnation, int number) {
  string key = worker_key(worker, incarnation);
  Call call{"claim",
            {key, key + ":inflight", "tried", "cancelled:lately", LISTS[0]},
            {"1", "1000000", "4194304", std::to_string(number), "1", "1"}};
  if (scene.intake) {
    call.keys.push_back(LISTS[1]);
    call.args.insert(call.args.end(), {"1", "2", "1", "1"});
  } else {
    call.args.push_back("1");
  }
  return call;
}

inline Call call_start(int worker, int incarnation, const Held& held) {
  string key = worker_key(worker, incarnation);
  string task = packed_array({packed(field_of(held)), packed(TASK_NAMES[held.task])});
  return {"start",
          {key + ":inflight", key + ":started", "cancelled", "alone", "tried", "ended", "ended:before"},
          {META, "task:", "dead:", "h", "1", worker_id(worker, incarnation), "1209600", packed_array({task})}};
}

// What the end of a task owes to others: [pushes, others].
inline std::pair<vector<string>, vector<string>> owed(int task, int ending) {
  vector<string> pushes, others;
  auto other = [](const string& state, const string& status) {
    return packed_array({packed(TASK_NAMES[1]), packed(state), packed(meta_text(status, 1)), packed(CLIENT_STREAM),
                         packed_array({})});
  };
  if (scene.chain && task == 0) {
    if (ending == SUCCEEDED) pushes.push_back(packed_array({packed(LISTS[0]), packed(message_of(1))}));
    if (ending == FAILED) others.push_back(other("failed", "FAILURE"));
    if (ending == CANCELLED || ending == EXPIRED) others.push_back(other("cancelled", "REVOKED"));
  }
  if (scene.part && task == 0 && ending != RETRYING)
    pushes.push_back(packed_array({packed(PART_LIST), packed("part")}));
  return {pushes, others};
}

inline string settlement(const Held& held, int ending) {
  static const char* const STATUS[] = {"", "SUCCESS", "FAILURE", "RETRY", "REVOKED", "REVOKED"};
  int task = scene.canvas && held.task == 3 ? 1 : held.task;
  string why = ending == EXPIRED ? "expired" : ending == CANCELLED ? "revoked" : "x";
  vector<string> parts = {packed(field_of(held)), packed(TASK_NAMES[task]), packed(ENDING_NAMES[ending]),
                          packed(meta_text(STATUS[ending], task, why)), packed(CLIENT_STREAM)};
  auto [pushes, others] = owed(task, ending);
  vector<string> webhooks;
  if (scene.hook && task == 0 && ending != RETRYING)
    webhooks.push_back(packed_array(
        {packed("w"), packed("h"), packed("w {\"samphire_watermark\":0}"), packed("")}));
  string letter = packed_array({}), retry = packed_array({}), streamed = packed_array({});
  if (ending == SUCCEEDED && held.outputs) streamed = packed_array({packed(held.outputs)});
  if (ending == FAILED)
    letter = packed_array(
        {packed(TASK_NAMES[task]), packed("m"), packed("r"), packed("e"), packed(held.attempts + 1), packed("y")});
  if (ending == RETRYING) retry = packed_array({packed(1000000), packed("y")});
  bool has_streamed = ending == SUCCEEDED && held.outputs;
  if (!pushes.empty() || !others.empty() || ending == FAILED || ending == RETRYING || has_streamed ||
      !webhooks.empty())
    parts.push_back(packed_array({packed_array({}), packed_array(pushes), packed_array(others), letter, retry, streamed,
                                  packed_array(webhooks), packed_array({})}));
  return packed_array(parts);
}

// The end of an errand that has pushed the first step of a canvas.
inline string errand_settlement(const Held& held) {
  string push = packed_array({packed(LISTS[0]), packed(message_of(0))}), none = packed_array({});
  return packed_array({packed(field_of(held)), packed(""), packed("succeeded"), packed(""), packed(""),
                       packed_array({none, packed_array({push}), none, none, none, none, none, none})});
}

inline Call call_settle(int worker, int incarnation, const vector<string>& settlements) {
  string key = worker_key(worker, incarnation);
  return {"settle",
          {key + ":inflight", key + ":started", "dead", "cancelled", "scheduled", "scheduled:messages", "tried",
           "ended", "ended:before", "ended:turn", "cancelled:running"},
          {META, "3600", "1000", "3600", "0", "dead:", "1209600", worker_id(worker, incarnation), "0:wake", "task:", "7200",
           packed_array(settlements)}};
}

inline Call call_release(int worker, int incarnation, const Held& held) {
  string key = worker_key(worker, incarnation);
  return {"release",
          {key + ":inflight", key + ":started", "tried"},
          {META, "task:", "1209600", held.flags & BLAMED ? "y" : "", held.flags & ENDPOINT_DIED ? "1" : "0",
           worker_id(worker, incarnation), field_of(held)}};
}

inline Call call_schedule(int worker, int incarnation, const Held& held, bool is_past) {
  string key = worker_key(worker, incarnation);
  return {
      "schedule",
      {key + ":inflight", key + ":started", "scheduled", "scheduled:messages", "cancelled", "ended", "ended:before"},
      {META, field_of(held), TASK_NAMES[held.task], is_past ? "1" : "5000000"}};
}

// The next output of a task; number 1 of an attempt is its start.
inline Call call_append(int worker, int incarnation, const Held& held) {
  string count = std::to_string(held.outputs + 1);
  return {"append",
          {worker_key(worker, incarnation) + ":inflight", "ended", "ended:before"},
          {worker_id(worker, incarnation), "task:", META, field_of(held), TASK_NAMES[held.task], "1.0",
           std::to_string(held.outputs + 2), "1", "output", "2.0", count, count, "x"}};
}

inline Call call_follow() {
  return {"follow",
          {"sub:follows", "ended", "ended:before", "scheduled:messages"},
          {META, "task:", "500", "10000"}};
}

inline Call call_route(int worker, int incarnation, const Held& held) {
  return {"route",
          {worker_key(worker, incarnation) + ":inflight"},
          {"0:wake", field_of(held), LISTS[0], LISTS[0]}};
}

inline Call call_due() { return {"due", {"scheduled", "scheduled:messages"}, {"0:wake", "500"}}; }

inline string cancel_request(int task) {
  return string(scene.otherclient ? "events:d " : "events:c ") + TASK_NAMES[task];
}

// `again`: requests that are made once more, after a look into all queues.
inline Call call_cancel(int worker, int incarnation, const string& revoked = "", const vector<string>& again = {}) {
  Call call{"cancel",
            {"sub:cancels", "cancelled", "scheduled", "scheduled:messages", "cancelled:lately",
             worker_key(worker, incarnation) + ":started", "sub:queues", "workers", "ended", "ended:before",
             "ended:turn", "cancelled:running"},
            {META, "3600", "1000", "3600", "604800", "100000",
             "{\"status\":\"REVOKED\",\"task_id\":\"\",\"result\":\"revoked\"}", "0:wake", "500",
             "cancelled:answer:", "inference", "worker:", "dead:", "task:", "7200", std::to_string(again.size())}};
  call.args.insert(call.args.end(), again.begin(), again.end());
  if (!revoked.empty()) call.args.push_back(revoked);
  return call;
}

inline Call call_letters() {
  return {"letters",
          {"sub:letters", "dead", "tried", "ended", "ended:before"},
          {"dead:", META, "task:", "0:wake", "200", "1000", "3600", "1209600", "sub:blob:"}};
}

inline Call call_leave(int worker, int incarnation) {
  string key = worker_key(worker, incarnation);
  return {"leave", {key, key + ":info", key + ":inflight", "workers", "samphire.namespace"},
          {worker_id(worker, incarnation)}};
}

inline Call call_alone(int worker, int incarnation, bool keep, int hold) {
  return {"alone",
          {"alone", "workers"},
          {worker_id(worker, incarnation), "m", keep ? "20000" : "0", "worker:", std::to_string(hold)}};
}

inline Call call_reap(int worker, int incarnation, bool has_lease) {
  string key = worker_key(worker, incarnation);
  return {"reap",
          {key, key + ":info", key + ":inflight", key + ":started", "workers", "tried", "alone"},
          {worker_id(worker, incarnation), has_lease ? "1" : "", META, "task:", "1209600", "y"}};
}
