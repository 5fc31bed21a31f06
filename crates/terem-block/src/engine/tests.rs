use super::*;
use crate::executor::Executor;
use std::fs::File;
use std::os::unix::fs::FileExt;

fn engines() -> Vec<Rc<Engine>> {
    vec![Engine::new(AioEngine::Auto).expect("an engine"), Engine::new(AioEngine::Threads).expect("threads")]
}

#[test]
fn reads_and_writes_scattered_memory() {
    for engine in engines() {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(b"0123456789", 0).expect("written");
        let check = file.try_clone().expect("a second handle");
        let fd = Arc::new(OwnedFd::from(file));
        let executor = Executor::new(Rc::clone(&engine));
        let views = [View::zeroed(3), View::zeroed(0), View::zeroed(4)];
        executor
            .block_on(async {
                let (memory, total) = Vectors::new(&views, 1);
                assert_eq!(total, 6);
                let job = Job { fd: Arc::clone(&fd), action: Action::Read { offset: 2, memory } };
                assert_eq!(engine.run(job).await.expect("read"), 6);
                assert_eq!((views[0].to_vec(), views[2].to_vec()), (b"\x0023".to_vec(), b"4567".to_vec()));

                let memory = Vectors::new(&[View::copy_of(b"ab"), View::copy_of(b"cd")], 0).0;
                let job = Job { fd: Arc::clone(&fd), action: Action::Write { offset: 8, memory } };
                assert_eq!(engine.run(job).await.expect("written"), 4);
                let job = Job { fd: Arc::clone(&fd), action: Action::Sync };
                assert_eq!(engine.run(job).await.expect("synced"), 0);
            })
            .expect("waited");
        let mut got = [0; 12];
        check.read_exact_at(&mut got, 0).expect("read");
        assert_eq!(&got, b"01234567abcd");
    }
}

#[test]
fn errors_come_with_their_number() {
    for engine in engines() {
        let fd = Arc::new(OwnedFd::from(File::open("/dev/null").expect("there")));
        let executor = Executor::new(Rc::clone(&engine));
        let memory = Vectors::new(&[View::zeroed(1)], 0).0;
        let job = Job { fd, action: Action::Write { offset: 0, memory } };
        let result = executor.block_on(engine.run(job)).expect("waited");
        assert_eq!(result.expect_err("not open for writing").raw_os_error(), Some(libc::EBADF));
    }
}

#[test]
fn abandoned_jobs_keep_their_memory_until_they_end() {
    for engine in engines() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let fd = Arc::new(OwnedFd::from(reader));
        let view = View::zeroed(8);
        let memory = Vectors::new(std::slice::from_ref(&view), 0).0;
        // preadv fails on a pipe at once in a thread; with io_uring it waits for data.
        let job = Job { fd, action: Action::Read { offset: u64::MAX, memory } };
        let running = engine.run(job);
        engine.wait(false).expect("submitted");
        drop(running);
        drop(view);
        drop(writer);
        drop(engine);
    }
}

#[test]
fn no_ring_of_the_bell_is_lost() {
    for engine in engines() {
        let (bell, sent) = (engine.bell(), Arc::new(std::sync::atomic::AtomicU32::new(0)));
        let told = Arc::clone(&sent);
        let ringer = std::thread::spawn(move || {
            for i in 1..=20_000 {
                told.store(i, Ordering::SeqCst);
                bell.ring();
                if i % 64 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        // If a ring were lost, the last wait would never end.
        while sent.load(Ordering::SeqCst) < 20_000 {
            engine.wait(true).expect("woken");
        }
        ringer.join().expect("rang");
    }
}
