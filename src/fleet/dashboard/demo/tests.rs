use std::collections::BTreeMap;

use super::*;

const START: u64 = 1_790_000_000_000;

#[test]
#[ignore]
fn look() {
    for n in [3, 100, 1000] {
        let t = std::time::Instant::now();
        let mut demo = Demo::new(n, START);
        println!(
            "== {n}: new {:?} pace {} rack {}",
            t.elapsed(),
            0,
            demo.tide.rack
        );
        let t = std::time::Instant::now();
        let times = (0..1400u64).map(|i| {
            let x = (1400 - i) as f64 / 1400.0;
            START - (86_400_000.0 * x * x * x) as u64
        });
        let past = demo.past(times);
        println!("past {:?}", t.elapsed());
        for p in past.iter().rev().step_by(60) {
            let s = &p.sample;
            println!(
                "{:>8} alive {} ready {} {:.1}/s busy {:.2} oldest {:?} q {:?} p50 {:.0} {:?}",
                (p.at_ms as i64 - START as i64) / 1000,
                s.alive,
                s.ready,
                s.jobs_per_s,
                s.busy.unwrap(),
                s.oldest_ms,
                s.queues.unwrap().jobs,
                s.workers_p50.unwrap(),
                s.versions
            );
        }
        let mut total = std::time::Duration::ZERO;
        let mut most = total;
        let mut text = 0;
        let mut evs = 0;
        let mut n_res = 0;
        for i in 1..=if n == 1000 { 600 } else { 1800u64 } {
            let t = std::time::Instant::now();
            let m = demo.step(START + i * 1000);
            let e = t.elapsed();
            total += e;
            most = most.max(e);
            n_res += m.results.len();
            evs += m.events.len();
            text = m.view.workers[0].live.text.len();
            if i == 1 || i % 120 == 0 {
                let busy = m
                    .view
                    .workers
                    .iter()
                    .filter(|w| w.record.progress.busy_ms > 0)
                    .count();
                let mut why = BTreeMap::<String, usize>::new();
                for w in m.view.workers.iter().filter(|w| !w.record.ready) {
                    *why.entry(w.record.state_detail.clone()).or_default() += 1;
                }
                println!(
                    "+{i}: alive {} ready {} busy {busy} res {} ({n_res}) ev {evs} q {:?} oldest {:?} {:?} p50 {:?} p95 {:?}",
                    m.view.workers.len(),
                    m.view.ready(),
                    m.results.len(),
                    m.view.queues,
                    demo.line.oldest_ms(demo.at_ms),
                    why,
                    m.view.workers[0].record.jobs.p50_ms,
                    m.view.workers[0].record.jobs.p95_ms
                );
                n_res = 0;
                evs = 0;
            }
            if n == 3 && i == 60 {
                println!("{}", m.view.workers[0].live.text);
                println!("{}", serde_json::to_string(&m.results[0].result).unwrap());
            }
        }
        println!(
            "step mean {:?} most {most:?} text {text}",
            total / if n == 1000 { 600 } else { 1800 }
        );
    }
}
